"""Stages, the pure step, the loop, and what keeps a run safe."""

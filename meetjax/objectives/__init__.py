"""Losses as pure functions of answer log-probabilities, and the log-probabilities themselves."""

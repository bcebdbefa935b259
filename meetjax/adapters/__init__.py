"""Small trainable trees: one bank holds any of `prompt`, `lora`, `edit`, `identity` and `reward`, and every entry has a gate."""

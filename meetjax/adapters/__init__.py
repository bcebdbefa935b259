"""Small trainable trees: one bank holds any of `prompt`, `lora`, `edit` and `identity`, and every entry has a gate."""

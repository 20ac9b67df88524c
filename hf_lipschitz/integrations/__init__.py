"""Every place that knows transformers, peft or accelerate from the inside."""

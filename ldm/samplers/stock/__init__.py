"""Draw as the schedulers of diffusers do: a model's own scheduler_config.json, followed class by class."""

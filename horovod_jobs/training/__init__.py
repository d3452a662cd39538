"""The one fit loop, objectives, schedules, precision and checkpoints."""

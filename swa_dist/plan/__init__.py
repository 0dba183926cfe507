"""What a run will be, decided in pure Python: options, schedules, the plan, and every message."""

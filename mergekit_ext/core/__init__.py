"""What every package uses, and what uses nothing of the project but its errors."""

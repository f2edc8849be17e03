"""One forward pass for many posterior draws: what they share runs once."""

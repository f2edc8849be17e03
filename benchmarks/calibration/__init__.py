"""What TFB buys on real tasks, beside every method a sceptic would name."""

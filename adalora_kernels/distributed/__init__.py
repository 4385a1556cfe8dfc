"""What crosses processes where the adapters, or their optimizer, lie on several."""

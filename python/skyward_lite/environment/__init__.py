"""How a bare host gets the environment of an image."""

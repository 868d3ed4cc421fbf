"""A bundle as a folder to deploy: formats (a file each), their registry, and writing them whole."""

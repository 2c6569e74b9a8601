"""Other tools that ask for our estimates."""

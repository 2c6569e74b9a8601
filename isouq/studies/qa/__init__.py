"""Questions to a language model, its answers, whether they are right, and how uncertain it was."""

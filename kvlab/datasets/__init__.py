"""Models and prompts to try things on."""

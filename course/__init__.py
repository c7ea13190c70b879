"""A course on SaLoRA: ten exercises, the handout that students get, and the grader. Start with exercises.md."""

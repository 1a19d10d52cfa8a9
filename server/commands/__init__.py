"""The commands of `headscope`, a module for each subject, and what they share."""

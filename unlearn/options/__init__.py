"""Options of an unlearning and of an audit; importable without torch."""

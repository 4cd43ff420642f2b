"""Which budget, slots and precision suit a machine, and the speed to expect: told from headers, nothing loaded."""

"""Which budget, slots and policy suit a machine, and the speed to expect."""

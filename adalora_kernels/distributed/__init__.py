"""What crosses processes, and how engines for several processes are told."""

"""The engine loop, and how it is reached: in a thread, in a process, or called directly."""

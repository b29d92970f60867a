"""What a run would cost on a cluster that is not there: memory, messages, operations and time."""

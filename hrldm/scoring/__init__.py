"""What a detector finds of inserted nodules."""

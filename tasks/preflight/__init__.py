"""What comes before the long work: find the model, refuse what cannot work, plan, check the disk."""

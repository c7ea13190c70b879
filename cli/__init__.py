"""What stands around the training loop: flags, run folders and resume, several processes, reports and pictures."""

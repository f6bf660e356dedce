"""What a job would cost, from a short calibration on this machine, and what it may."""

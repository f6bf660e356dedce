"""What researchers run: each study names its stages, judges what they hold and writes a run."""

"""One function per stage: from settings and earlier stages to a `Stage` value, whose build is plain work."""

"""One file per verb; each builds its options and runs one library function."""

"""What every part needs of the operating system: files read and written safely, terminals, signs."""

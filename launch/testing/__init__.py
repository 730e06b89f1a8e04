"""What tests of the programs share."""

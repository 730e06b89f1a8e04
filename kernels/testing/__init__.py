"""What tests of the operations share: cases, an interpreter that guards memory, bytes moved."""

"""The quickstart with fewer or smaller experts: bits per character and bytes."""

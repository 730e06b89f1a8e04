"""What the certificate's models of time and memory are measured by and compared with."""

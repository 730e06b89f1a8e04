"""What the certificate's model of time is measured by and compared with."""

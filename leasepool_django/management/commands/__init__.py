"""Django finds the ``leasepool`` command here."""

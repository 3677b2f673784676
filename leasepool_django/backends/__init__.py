"""What pools are made of: one module per backend, all behind the contract in ``base``."""

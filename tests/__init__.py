"""The tests of leasepool_django: real processes, real signals, nothing left behind."""

"""What preparing data costs."""

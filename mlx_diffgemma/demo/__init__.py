"""Data only: a small trained model. Its README says what it can do."""

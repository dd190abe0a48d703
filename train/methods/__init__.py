"""What can be trained with: one record a method, and its options."""

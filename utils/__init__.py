"""What the experiment scripts share: one noun per module, imports going one way."""

"""What only a GPU can show. Without one these tests are skipped."""

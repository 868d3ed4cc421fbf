"""What is quantised, and how: recipes, schemes, ranges, arithmetic, Q/DQ."""

"""Result tables, figures, HTML reports and the dataset card."""

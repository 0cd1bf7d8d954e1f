"""What a run will take, before anything is rented: arithmetic on shapes; loads no weights."""

"""The selective scan: an element-wise recurrence whose gates depend on the token."""

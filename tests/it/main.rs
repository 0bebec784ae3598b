mod support;
mod support_tests;

//! Writes the generated files, or with `--check` compares them and names those that differ.

use std::error::Error;
use std::process::ExitCode;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_check = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--check"] => true,
        _ => {
            eprintln!("usage: generate [--check]");
            return Ok(ExitCode::from(2));
        }
    };
    let root = generate::root();
    let mut status = ExitCode::SUCCESS;
    for output in generate::outputs(&root)? {
        if output.is_current(&root) {
            continue;
        }
        if is_check {
            eprintln!("{} differs from the route table; run `cargo run -p generate`", output.path);
            status = ExitCode::FAILURE;
        } else {
            output.write(&root)?;
            println!("wrote {}", output.path);
        }
    }
    Ok(status)
}

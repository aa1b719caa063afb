//! Reads the line of a variant of the kernel lab that changes how its kernels are launched:
//!
//! ```text
//! // launch: threads 512, blocks x/2, shared 16384
//!
//! launch = item {"," item}
//! item   = ("threads" | "shared") value | "blocks" value [value [value]]
//! value  = factor {("*" | "/") factor}                without spaces, from left to right, "/" rounds up
//! factor = NUMBER | "x" | "y" | "z" | "threads" | "shared" | "sms"
//! ```
//!
//! Names stand for numbers of the shipped launch: its blocks in x, y and z, its threads, its dynamic shared memory in
//! bytes; `sms` is the number of multiprocessors. What the line does not name stays as shipped.

use crate::ops::Grid;

/// How a variant's launch differs from the shipped one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Geometry {
    blocks: [Option<Value>; 3],
    threads: Option<Value>,
    shared: Option<Value>,
}

/// Multiplied or divided (`true`) from left to right.
type Value = Vec<(bool, Factor)>;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Factor {
    Number(u32),
    Blocks(usize),
    Threads,
    Shared,
    Sms,
}

impl Geometry {
    pub(super) fn parse(text: &str) -> Result<Geometry, String> {
        let mut geometry = Geometry::default();
        for item in text.split(',').map(str::trim).filter(|_| !text.is_empty()) {
            let wrong = |what: &str| format!("launch: {item:?}: {what}");
            let (key, values) = item.split_once(' ').unwrap_or((item, ""));
            let values: Vec<Value> =
                values.split_whitespace().map(value).collect::<Result<_, _>>().map_err(|e| wrong(&e))?;
            match (key, &values[..]) {
                ("threads", [v]) => geometry.threads = Some(v.clone()),
                ("shared", [v]) => geometry.shared = Some(v.clone()),
                ("blocks", [_] | [_, _] | [_, _, _]) => {
                    geometry.blocks.iter_mut().zip(values).for_each(|(place, v)| *place = Some(v));
                }
                ("threads" | "shared", _) => return Err(wrong("expected one value")),
                ("blocks", _) => return Err(wrong("expected one to three values")),
                _ => return Err(wrong("expected threads, blocks or shared, and a value")),
            }
        }
        Ok(geometry)
    }

    /// The launch that takes the place of `shipped` on a GPU of `sms` multiprocessors.
    pub(super) fn apply(&self, shipped: Grid, sms: u32) -> Result<Grid, String> {
        let number = |value: &Option<Value>, as_shipped: u32, name: &str, least: u32, most: u32| {
            let Some(value) = value else { return Ok(as_shipped) };
            let n = value.iter().try_fold(1u64, |n, (divide, factor)| {
                let f = u64::from(match *factor {
                    Factor::Number(n) => n,
                    Factor::Blocks(axis) => shipped.blocks[axis],
                    Factor::Threads => shipped.threads,
                    Factor::Shared => shipped.shared,
                    Factor::Sms => sms,
                });
                if *divide { (f > 0).then(|| n.div_ceil(f)) } else { Some(n.saturating_mul(f)) }
            });
            let n = n.ok_or_else(|| format!("launch: {name}: a division by 0 with {shipped:?}"))?;
            let fits = u32::try_from(n).ok().filter(|n| (least..=most).contains(n));
            fits.ok_or_else(|| format!("launch: {name} is {n} with {shipped:?}, expected {least} to {most}"))
        };
        let blocks = |axis: usize, name, most| number(&self.blocks[axis], shipped.blocks[axis], name, 1, most);
        Ok(Grid {
            blocks: [
                blocks(0, "blocks x", i32::MAX as u32)?,
                blocks(1, "blocks y", 65535)?,
                blocks(2, "blocks z", 65535)?,
            ],
            threads: number(&self.threads, shipped.threads, "threads", 1, 1024)?,
            shared: number(&self.shared, shipped.shared, "shared", 0, i32::MAX as u32)?,
        })
    }
}

fn value(text: &str) -> Result<Value, String> {
    let mut factors = Vec::new();
    for (i, part) in text.split_inclusive(['*', '/']).enumerate() {
        // the operator is at the end of the part before
        let divide = i > 0 && text[..part.as_ptr() as usize - text.as_ptr() as usize].ends_with('/');
        let name = part.trim_end_matches(['*', '/']);
        let factor = match name {
            "x" => Factor::Blocks(0),
            "y" => Factor::Blocks(1),
            "z" => Factor::Blocks(2),
            "threads" => Factor::Threads,
            "shared" => Factor::Shared,
            "sms" => Factor::Sms,
            _ => Factor::Number(name.parse().map_err(|_| {
                format!("{name:?} in {text:?} is neither a number nor one of x, y, z, threads, shared, sms")
            })?),
        };
        factors.push((divide, factor));
    }
    if text.ends_with(['*', '/']) {
        return Err(format!("{text:?} ends with an operator"));
    }
    Ok(factors)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: Grid = Grid { blocks: [9, 2, 1], threads: 128, shared: 1000 };

    fn applied(text: &str) -> Result<Grid, String> {
        Geometry::parse(text)?.apply(SHIPPED, 132)
    }

    #[test]
    fn a_launch_changes_what_it_names() {
        assert_eq!(applied(""), Ok(SHIPPED));
        let grid = |blocks, threads, shared| Ok(Grid { blocks, threads, shared });
        assert_eq!(applied("threads 512, blocks x/2, shared 16384"), grid([5, 2, 1], 512, 16384));
        assert_eq!(applied("blocks x*y 1"), grid([18, 1, 1], 128, 1000));
        assert_eq!(applied("blocks sms*2 1 z,threads threads*2"), grid([264, 1, 1], 256, 1000));
        assert_eq!(applied("shared threads*16/3*2"), grid([9, 2, 1], 128, 683 * 2));
        assert_eq!(applied("shared 0"), grid([9, 2, 1], 128, 0));
    }

    #[test]
    fn a_wrong_launch_says_what_is_wrong() {
        for (text, expected) in [
            ("threds 512", "\"threds 512\": expected threads, blocks or shared"),
            ("threads 512,", "\"\": expected threads, blocks or shared"),
            ("threads", "expected one value"),
            ("threads 1 2", "expected one value"),
            ("blocks", "expected one to three values"),
            ("blocks 1 1 1 1", "expected one to three values"),
            ("blocks w/2", "\"w\" in \"w/2\" is neither a number nor one of x,"),
            ("threads 5*", "\"5*\" ends with an operator"),
            ("threads *5", "\"\" in \"*5\""),
            ("threads -1", "\"-1\""),
            ("threads 2048", "threads is 2048 with"),
            ("blocks x/0", "blocks x: a division by 0"),
            ("blocks 0", "blocks x is 0 with"),
            ("blocks 1 65536", "blocks y is 65536 with"),
            ("shared 4294967295*4294967295*4294967295", "expected 0 to 2147483647"),
        ] {
            let error = applied(text).unwrap_err();
            assert!(error.starts_with("launch: ") && error.contains(expected), "{text}: {error}");
        }
    }
}

//! `strftime_now` of chat templates: Python's `datetime.now().strftime(format)` in the C locale.

use jiff::{ZonedDateTime, fmt::strtime};

/// `time` as `format` says, with all directives of glibc and Python.
///
/// # Errors
/// What is wrong with a directive: templates are tried against Python, which knows no other ones.
pub fn strftime(format: &str, time: &ZonedDateTime) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let directive = &rest[at + 1..];
        // Flags, a width, and a modifier, which means nothing in the C locale.
        let flags = directive.len() - directive.trim_start_matches(['-', '_', '0', '^', '#']).len();
        let width =
            directive[flags..].len() - directive[flags..].trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let name = directive[flags + width..].trim_start_matches(['E', 'O']);
        let letter = name.chars().next();
        let end = directive.len() - name.len() + letter.map_or(0, char::len_utf8);
        let wrong = || format!("strftime_now: Python knows no directive %{}", &directive[..end]);
        let letter = letter.ok_or_else(wrong)?;
        let text = match letter {
            'c' => strftime("%a %b %e %H:%M:%S %Y", time)?,
            'D' | 'x' => strftime("%m/%d/%y", time)?,
            'F' => strftime("%Y-%m-%d", time)?,
            'R' => strftime("%H:%M", time)?,
            'T' | 'X' => strftime("%H:%M:%S", time)?,
            'r' => strftime("%I:%M:%S %p", time)?,
            'f' => format!("{:06}", time.subsec_nanosecond() / 1000),
            's' => time.timestamp().as_second().to_string(),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            'z' | 'Z' => String::new(), // Python's `now` is in no zone that it could name
            'a' | 'A' | 'b' | 'B' | 'C' | 'd' | 'e' | 'g' | 'G' | 'h' | 'H' | 'I' | 'j' | 'k' | 'l' | 'm' | 'M'
            | 'p' | 'P' | 'S' | 'u' | 'U' | 'V' | 'w' | 'W' | 'y' | 'Y' => {
                let padding = directive[..flags + width].replace(['^', '#'], "");
                strtime::format(format!("%{padding}{letter}"), time).map_err(|_| wrong())?
            }
            _ => return Err(wrong()),
        };
        let flag = |c: char| directive[..flags].contains(c);
        match letter {
            'p' if flag('#') => out.push_str(&text.to_lowercase()),
            _ if flag('^') || flag('#') => out.push_str(&text.to_uppercase()),
            _ => out.push_str(&text),
        }
        rest = &directive[end..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::civil::date;

    /// What Python 3.11 on Debian 12 gives for the same.
    #[test]
    fn every_directive_is_pythons() {
        let format = "%a|%A|%b|%B|%c|%C|%d|%D|%e|%f|%F|%g|%G|%h|%H|%I|%j|%k|%l|%m|%M|%p|%P|%r|%R|%S|%T|%u|%U|%V|%w|%W|%x|%X|%y|%Y|%z|%Z|%n|%t|%%";
        for (time, expected) in [
            (
                date(2024, 1, 7).at(0, 4, 5, 6_007_000),
                "Sun|Sunday|Jan|January|Sun Jan  7 00:04:05 2024|20|07|01/07/24| 7|006007|2024-01-07|24|2024|Jan|00|12|007| 0|12|01|04|AM|am|12:04:05 AM|00:04|05|00:04:05|7|01|01|0|01|01/07/24|00:04:05|24|2024|||\n|\t|%",
            ),
            (
                date(2027, 1, 1).at(15, 30, 0, 0),
                "Fri|Friday|Jan|January|Fri Jan  1 15:30:00 2027|20|01|01/01/27| 1|000000|2027-01-01|26|2026|Jan|15|03|001|15| 3|01|30|PM|pm|03:30:00 PM|15:30|00|15:30:00|5|00|53|5|00|01/01/27|15:30:00|27|2027|||\n|\t|%",
            ),
        ] {
            let time = time.in_tz("UTC").unwrap();
            assert_eq!(strftime(format, &time).unwrap(), expected);
        }
    }

    #[test]
    fn flags_and_what_python_does_not_know() {
        let time = date(2024, 1, 7).at(9, 4, 5, 0).in_tz("UTC").unwrap();
        let of = |format| strftime(format, &time);
        assert_eq!(
            of("%-d %B %Y|%-m/%-d|%_d|%_H|%-I%#p|%^a %^B|%Ey %Od|%3d|한 %d").unwrap(),
            "7 January 2024|1/7| 7| 9|9am|SUN JANUARY|24 07|007|한 07"
        );
        for unknown in ["%Q", "%", "%-", "a%.f", "%:z", "%N", "%한"] {
            let error = of(unknown).unwrap_err();
            assert!(error.contains("no directive %"), "{error}");
        }
    }
}

// {fmt}, compiled once: as headers only it costs each file that formats a message 4 s, under the sanitizers 8. Its
// namespace is ours (cmake/Fmt.cmake), so a program that links another {fmt} has both.
#include <fmt/format-inl.h>

FMT_BEGIN_NAMESPACE
namespace detail {

// What {fmt}'s headers use and leave to its library to instantiate.
template auto dragonbox::to_decimal(float x) -> dragonbox::decimal_fp<float>;
template auto dragonbox::to_decimal(double x) -> dragonbox::decimal_fp<double>;
template locale_ref::locale_ref(const std::locale& locale);
template auto locale_ref::get<std::locale>() const -> std::locale;
template auto thousands_sep_impl(locale_ref locale) -> thousands_sep_result<char>;
template auto decimal_point_impl(locale_ref locale) -> char;

}  // namespace detail
FMT_END_NAMESPACE
